"""Operations on whole matrices that only the tools need. See peraxis_format.ops."""
