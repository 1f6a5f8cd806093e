"""What the page shows on a node: a text on its own display (the server's `send_progress_text`), and which options have
no meaning for its model."""

from __future__ import annotations

import sys
from typing import Any

from ..shared_tome.methods import AUTO, UNET_ALONE

MODEL = "tome.model"  # the event that web/tome.js waits for


def show_on_node(node: str | None, text: str, everywhere: bool = False) -> None:
    """Show a text on a node of the page that has queued the prompt, or everywhere: of all open pages. Nothing where
    there is no such page (a script's request, a test), or where the server cannot: the log and ToMe Report have it all
    the same.

    node: its id in the prompt, as Hidden.unique_id tells; None: no node.
    """
    server = _server()
    send, client = getattr(server, "send_progress_text", None), getattr(server, "client_id", None)
    if node is None or send is None or (client is None and not everywhere):
        return
    send(text, node, None if everywhere else client)


def mark_on_node(node: str | None, is_unet: bool) -> None:
    """Have the page grey what the model does not look at. node: as above. is_unet: else it is a transformer."""
    server = _server()
    send, client = getattr(server, "send_sync", None), getattr(server, "client_id", None)
    if node is None or send is None or client is None:
        return
    idle, means = ([], {AUTO: "sample"}) if is_unet else (list(UNET_ALONE), {})
    send(MODEL, {"node": node, "idle": idle, "means": means}, client)


def _server() -> Any:
    # Not imported: outside a running server there is none, and importing its module would start parts of one.
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
