"""What a request says of draft training: in its body's ``custom_params``, or in HTTP headers, which become such.

A request of a LoRA adapter that is not labelled is labelled with it.
"""

from typing import Any

OPT_KEY, SLICE_KEY = "draft_training", "draft_slice"
OPT_HEADER, SLICE_HEADER = "x-draft-training", "x-draft-slice"
_ANSWERS = {"true": True, "false": False}


def take_headers(manager: Any, obj: Any, request: Any = None, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``TokenizerManager.generate_request(obj, request)``, which all HTTP routes come to.

    Raises:
        ValueError: the header says neither true nor false; SGLang answers 400.
    """
    said = _said(request.headers) if request is not None else {}
    adapter, sampling = getattr(obj, "lora_path", None), getattr(obj, "sampling_params", None) or {}
    if not said and not adapter:
        return
    if isinstance(adapter, list) and isinstance(sampling, dict):
        sampling = [sampling] * len(adapter)
    if isinstance(sampling, list):
        adapters = adapter if isinstance(adapter, list) else [adapter] * len(sampling)
        obj.sampling_params = [_with(one, said, name) for one, name in zip(sampling, adapters, strict=False)]
    elif isinstance(sampling, dict):
        obj.sampling_params = _with(sampling, said, adapter)


def asked(req: Any) -> dict[str, Any]:
    """Of a scheduler's ``Req``."""
    return req.sampling_params.custom_params or {}


def _said(headers: Any) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if (answer := headers.get(OPT_HEADER)) is not None:
        if answer.strip().lower() not in _ANSWERS:
            raise ValueError(f"header {OPT_HEADER}: {answer!r} is not accepted; give true or false")
        said[OPT_KEY] = _ANSWERS[answer.strip().lower()]
    if (label := headers.get(SLICE_HEADER)) is not None:
        said[SLICE_KEY] = label
    return said


def _with(sampling: dict[str, Any], said: dict[str, Any], adapter: str | None) -> dict[str, Any]:
    """A no in the body stands, whatever the header says."""
    own = sampling.get("custom_params") or {}
    refused = {OPT_KEY: False} if own.get(OPT_KEY) is False else {}
    label = {SLICE_KEY: f"adapter:{adapter}"} if adapter else {}
    return {**sampling, "custom_params": {**label, **own, **said, **refused}}
