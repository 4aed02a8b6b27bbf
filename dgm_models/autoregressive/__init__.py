"""Autoregressive models: exact probabilities, one number after the other. Importing this registers the families."""

from .base import Autoregressive
from .fvsbn import FVSBN
from .gated_pixelcnn import GatedPixelCNN
from .image_gpt import ImageGPT
from .made import MADE
from .pixelcnn import PixelCNN
from .wavenet import WaveNet

__all__ = ["FVSBN", "MADE", "Autoregressive", "GatedPixelCNN", "ImageGPT", "PixelCNN", "WaveNet"]
