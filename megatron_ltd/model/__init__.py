"""GPT, BERT and ViT, block by block.

Legend of the shapes in this package:

    s sequence    b microbatch    h hidden    n query heads    g key/value heads    d channels of a head
    f ffn         v vocabulary    k tokens a layer keeps       l layers             t tensor-parallel size

Hidden states are [s, b, h]: sequence first, so that a slice of the sequence is contiguous. Token tensors are [b, s];
the one transposition is in `embedding.py`.
"""
