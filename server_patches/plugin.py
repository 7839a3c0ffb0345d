"""The entry point that SGLang calls in the launcher and in every process it spawns (``sglang.srt.plugins``)."""

from sglang_specforge.settings import Run


def plugin() -> None:
    """Register what this process needs.

    Without ``--enable-draft-training`` that is the flags themselves and, on the CPU engine, the portable kernels.
    """
    from server_patches.cpu import install

    if install.needs_portable_kernels():
        install.install_kernels()
        from server_patches.cpu.hooks import register_hooks

        register_hooks()

    from server_patches import v0_5_23

    if Run.inherited() is None:
        v0_5_23.register_flag_hooks()
    else:
        v0_5_23.register_scheduler_hooks()
