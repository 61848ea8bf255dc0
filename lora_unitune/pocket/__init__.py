"""The bundled base: a small pipeline in Stable Diffusion's layout, and the synthetic scenes it was trained on."""
