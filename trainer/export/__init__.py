"""A trained student as others load it: a timm model folder, ONNX, and a card that says where it comes from."""
