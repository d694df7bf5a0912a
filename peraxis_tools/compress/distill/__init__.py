"""End-to-end distillation of scales, signs and full tensors."""
