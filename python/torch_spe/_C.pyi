from typing import Any

STREAMS: dict[str, int]

def build_info() -> dict[str, Any]: ...
