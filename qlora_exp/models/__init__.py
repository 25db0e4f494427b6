"""The only package that imports bitsandbytes and peft. bitsandbytes comes first, without TorchInductor: see
libraries.py."""

from qlora_exp.models import libraries as libraries
