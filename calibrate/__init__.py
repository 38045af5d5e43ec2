"""The measuring side: runs the real libraries (torch, transformers, peft, bitsandbytes); never imported by `planner`."""
