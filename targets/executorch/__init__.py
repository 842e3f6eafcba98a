"""ExecuTorch on XNNPACK, and lowered for Vulkan."""
