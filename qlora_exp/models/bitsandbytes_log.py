"""Quiet what bitsandbytes logs at import and at every layer's first forward: an optional kernel that isn't installed,
and that LLM.int8() takes 16-bit inputs. Imported before bitsandbytes."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
