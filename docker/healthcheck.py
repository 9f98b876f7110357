"""Exit 0 when the server inside this container is ready for work."""

import os
import urllib.request

port = os.environ.get("SERVICE_HTTP__PORT", "8000")
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is for what is outside
opener.open(f"http://127.0.0.1:{port}/readyz", timeout=2).close()
