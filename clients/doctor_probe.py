"""The process in which `moescope doctor` imports torch and vLLM; its last line is JSON.

Run by doctor.py as `python -m moescope.clients.doctor_probe`.
"""

import importlib.util
import json
from typing import Any


def probe() -> dict[str, Any]:
    """The fields of `doctor.Probe`."""
    import torch

    from moescope.tracer.errors import MoescopeError
    from moescope.tracer.vllm_seam import SUPPORTED, install

    seam = None
    try:
        install()
    except MoescopeError as error:
        seam = str(error)
    gpus = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            capability = [card.major, card.minor]
            gpus.append({"name": card.name, "capability": capability, "memory": card.total_memory})
    return {
        "supported": SUPPORTED,
        "seam": seam,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.util.find_spec("triton") is not None,
        "gpus": gpus,
    }


if __name__ == "__main__":
    print(json.dumps(probe()))
