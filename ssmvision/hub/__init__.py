"""Where weights come from: checked downloads, safe reading of any checkpoint, key reports, model cards."""

from .cards import Published, render_card
from .checkpoint import (
    CheckpointError,
    KeyReport,
    compare_keys,
    extract_state_dict,
    load_state_dict,
    read_checkpoint,
)
from .download import DownloadError, fetch_from_hub, fetch_url, file_sha256
from .network_cards import NetworkCfg, render_network_card

__all__ = [
    "CheckpointError",
    "DownloadError",
    "KeyReport",
    "NetworkCfg",
    "Published",
    "compare_keys",
    "extract_state_dict",
    "fetch_from_hub",
    "fetch_url",
    "file_sha256",
    "load_state_dict",
    "read_checkpoint",
    "render_card",
    "render_network_card",
]
