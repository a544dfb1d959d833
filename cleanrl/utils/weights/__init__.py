"""Network weights: `files` reads and writes them, `layouts` converts and checks their names and shapes."""
