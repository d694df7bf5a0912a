"""Operations on whole matrices that the tools alone need. See peraxis_format.ops."""
