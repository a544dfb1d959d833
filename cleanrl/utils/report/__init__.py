"""Reports of finished runs: `python -m cleanrl.utils.report`.

`runs` finds runs and `events` reads their files, `statistics` summarises them; `content`, with `curves` and
`all_games`, says what a report contains; `pictures` draws its plots, `pages` writes its Markdown and HTML.
"""
