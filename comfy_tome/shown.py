"""A text on the node's own display, by what ComfyUI's server has for that (`send_progress_text`)."""

from __future__ import annotations

import sys


def show_on_node(node: str | None, text: str, everywhere: bool = False) -> None:
    """Show a text on a node of the page that has queued the prompt, or everywhere: of all open pages. Nothing where
    there is no such page (a script's request, a test), or where the server cannot: the log and ToMe Report have it all
    the same.

    node: its id in the prompt, as Hidden.unique_id tells; None: no node.
    """
    # Not imported: outside a running server there is none, and importing its module would start parts of one.
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    send, client = getattr(server, "send_progress_text", None), getattr(server, "client_id", None)
    if node is None or send is None or (client is None and not everywhere):
        return
    send(text, node, None if everywhere else client)
