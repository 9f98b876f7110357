"""Exit 0 when the server inside this container is ready for work."""

import os
import urllib.request

port = os.environ.get("SERVICE_PORT", "8000")
urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2).close()
