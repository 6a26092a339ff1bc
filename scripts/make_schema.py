"""Write configs/schema.json, the JSON schema of routing configs. --check fails if it is stale."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sglang_moe_routing.config import json_schema
from sglang_moe_routing.policies import builtin_registry

SCHEMA = Path(__file__).parents[1] / "configs" / "schema.json"


def main() -> int:
    text = json.dumps(json_schema(builtin_registry()), indent=2) + "\n"
    if "--check" not in sys.argv:
        SCHEMA.write_text(text)
    elif not SCHEMA.exists() or SCHEMA.read_text() != text:
        print(f"{SCHEMA} is stale; run: python scripts/make_schema.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
