#!/usr/bin/env python3
"""Write docs/machine.schema.json, the published JSON schema of a machine's spec. ``--check`` only compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
sys.path.insert(0, str(ROOT / "scripts"))

from gen_cli_docs import write  # noqa: E402

from posada.model.machine import json_schema  # noqa: E402

if __name__ == "__main__":
    sys.exit(write(ROOT / "docs" / "machine.schema.json", json.dumps(json_schema(), indent=2) + "\n"))
