"""The data URI of an image file: data_uri.py FILE."""

import base64
import sys
from pathlib import Path

print("data:image/png;base64," + base64.b64encode(Path(sys.argv[1]).read_bytes()).decode())
