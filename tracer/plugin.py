"""The entry point `vllm.general_plugins`, which vLLM loads in every one of its processes."""

import logging

logger = logging.getLogger("moescope")


def register() -> None:
    """Install the tracer; idle until a trace starts. Fails loudly where vLLM does not fit."""
    try:
        from moescope.tracer.vllm_seam import install

        install()
    except Exception as error:
        logger.error("moescope can't trace this vLLM: %s", error)
        raise
