import importlib.util

collect_ignore_glob = ["*"] if importlib.util.find_spec("triton") is None else []
