"""What the verbs share about delta files: content, parts, signatures, blocks of rows, rebuilt tensors."""
