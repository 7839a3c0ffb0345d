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

    if Run.inherited() is None:
        from server_patches.common.launcher import register_flag_hooks

        register_flag_hooks()
    else:
        from server_patches.supported import register_scheduler_hooks

        register_scheduler_hooks()
