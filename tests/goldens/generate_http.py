"""Write tests/goldens/http.txt anew: python tests/goldens/generate_http.py

Look at the difference before committing it: every changed line is something that clients see.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from http_cases import CASES, PacedDelivery, record
from http_server import running_server
from tiny_models import tiny_artifact

GOLDEN = Path(__file__).parent / "http.txt"


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_artifact(Path(directory)).path
        with running_server(model) as server:
            server.service.delivery = PacedDelivery(server.loop)
            GOLDEN.write_text("\n".join(record(server, case) for case in CASES), encoding="utf-8")


if __name__ == "__main__":
    main()
