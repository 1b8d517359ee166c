"""Everything that depends on vLLM's version: plugin, worker (engine side), server.

Seen to work with vLLM 0.31 and 0.32 on CPU. No other module of Elbowroom imports vLLM.
"""

REPLICA_MARK = "ELBOWROOM_REPLICA"
"""Set in the processes of a replica: the plugin is loaded in every vLLM on this machine."""

ENVIRONMENT = {
    REPLICA_MARK: "1",
    # Nothing leaves the machine: no hub, no usage reports.
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # A host that may be fetched from must not send us elsewhere.
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    # The engine core runs its one worker itself, instead of in one more process on the same core.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # A fork of a process that has threads, as ours has, may hang, and does not end with it.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Rows may carry URLs, and a row that fails must not print its body.
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Set for the process of a replica, before vLLM is imported; what the user set wins."""

CONFIG_KEY = "elbowroom"
"""Key in vLLM's ``additional_config`` that holds our share of the pool, and the name of our loader
for ``--load-format``."""
