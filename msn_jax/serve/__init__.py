"""A server that speaks the OpenAI protocol: `python -m msn_jax.serve --ckpt CHECKPOINT`."""
