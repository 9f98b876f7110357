"""Send every query of the dashboard and of the adapter's rule to Prometheus, and print their numbers of series.

python docker/check/dashboard.py http://127.0.0.1:9090
"""

import json
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import yaml

DOCKER = Path(__file__).parents[1]


def series(prometheus: str, query: str) -> int:
    """Return the number of series of a query. Raises HTTPError for an invalid one."""
    parameters = urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query?{parameters}", timeout=10) as answer:
        return len(json.load(answer)["data"]["result"])


def main() -> None:
    """Replace the variables of Grafana and of the adapter in each query, and send it."""
    prometheus = sys.argv[1].rstrip("/")
    panels = json.loads((DOCKER / "grafana" / "dashboards" / "service.json").read_text())["panels"]
    queries = [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]
    for rule in yaml.safe_load((DOCKER / "k8s" / "adapter.yaml").read_text())["rules"]["custom"]:
        filled = rule["metricsQuery"].replace("<<.LabelMatchers>>", 'job="service"').replace("<<.GroupBy>>", "instance")
        queries.append((rule["name"]["as"], filled))
    for title, query in queries:
        print(f"{series(prometheus, query.replace('$__rate_interval', '1m')):3}  {title}")


if __name__ == "__main__":
    main()
