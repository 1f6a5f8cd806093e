"""ToMe in ComfyUI. Imports nothing by itself: the nodes need ComfyUI, the U-Net's patches (unet.py) do not."""
