"""What the targets share: the artifact's folder, sources of tensors, sessions, tokenizers, recipes."""
