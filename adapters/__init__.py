"""Task heads around timm backbones whose channels gatedprune can gate; installed as `gatedprune.adapters`."""
