"""Everything that knows SGLang's internals: hook targets, their shapes, and the portable CPU kernels."""
