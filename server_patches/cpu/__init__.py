"""SGLang's CPU engine on any CPU: portable PyTorch versions of the ``sgl_kernel`` operators it calls."""
