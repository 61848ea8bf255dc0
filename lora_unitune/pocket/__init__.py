"""The embedded base: a small Stable-Diffusion-layout pipeline, and the drawn world it was trained on."""
