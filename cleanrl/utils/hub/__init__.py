"""The Hugging Face Hub: `download` fetches a file, `publish` uploads a run, `card` writes its model card.

The first two reach the Hub through `client`.
"""

import os
import re
from urllib.parse import urlsplit

try:  # the Hub's client believes it as soon as it is imported
    _address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    _is_address = _address.scheme in ("http", "https") and _address.hostname and _address.port != 0
except ValueError:
    _is_address = False
if not _is_address:  # it may hold a password, and is not shown
    raise SystemExit("error: HF_ENDPOINT is not an address like https://huggingface.co; correct or unset it")
for _name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
    if not re.fullmatch(r"([1-9][0-9]{0,5})?", os.environ.get(_name, "")):
        raise SystemExit(f"error: {_name} is not a whole number of seconds; correct or unset it")
