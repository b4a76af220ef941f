"""The environments of vLLM processes that are replicas of one data-parallel engine."""

from ports import free_port

# vLLM 0.32 takes ports from the master's upwards, and keeps this many for itself.
_PORTS = 10


def replicas(count: int) -> list[dict[str, str]]:
    """One environment for each of `count` replicas on this host."""
    port = free_port(_PORTS)
    return [
        {
            "VLLM_DP_RANK": f"{rank}",
            "VLLM_DP_RANK_LOCAL": f"{rank}",
            "VLLM_DP_SIZE": f"{count}",
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": f"{port}",
        }
        for rank in range(count)
    ]
