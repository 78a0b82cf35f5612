"""vLLM, in this process or behind servers: the only room that imports vllm, and the only HTTP client."""
