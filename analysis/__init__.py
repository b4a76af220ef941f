"""Questions to a trace store: SQL views, checks and risk differences. Needs neither torch nor vLLM."""
