"""Teachers behind servers, vLLM's and SGLang's: asked over HTTP for the likeliest ids of windows, and known again.

Models that run in this process belong to `teachers.huggingface`, how logits become targets to `teachers.reduction`.
"""
