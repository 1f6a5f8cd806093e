"""Token Merging for ComfyUI: what custom_nodes loads. AUTOMATIC1111 never runs this file."""

if __package__:  # empty where pytest collects this folder; the relative imports below need a package
    from .comfy_tome.schema import TOO_OLD, is_too_old

    if is_too_old():
        import logging

        logging.getLogger("ToMe").warning("[ToMe] %s", TOO_OLD)
        NODE_CLASS_MAPPINGS = {}  # none, and no traceback
    else:
        import os

        from comfy_api.latest import ComfyExtension

        from .comfy_tome.nodes import NODES

        WEB_DIRECTORY = "./web"  # its docs/ are the nodes' help pages
        _nodes = list(NODES)
        if os.environ.get("TOME_DEMO") == "1":  # set by `install.py demo`: its model is of no use to anybody else
            from .demo.nodes import NODES as _demo_nodes

            _nodes += _demo_nodes

        class ToMeExtension(ComfyExtension):
            """The nodes of this pack."""

            async def get_node_list(self):
                return _nodes

        async def comfy_entrypoint() -> ToMeExtension:
            """ComfyUI asks for the pack's nodes here."""
            return ToMeExtension()
