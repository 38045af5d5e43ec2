"""The measuring side: the real libraries (torch, transformers, peft, bitsandbytes), run; `planner` never imports it."""
