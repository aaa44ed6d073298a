"""What a model costs: multiply-accumulates that are really executed, latency by one timer, the machine."""

from .environment import Environment, environment
from .latency import Latency, measure_latency
from .macs import MacCount, count_macs, count_parameters, flop_counter_macs
from .memory import Memory, measure_memory

__all__ = [
    "Environment",
    "Latency",
    "MacCount",
    "Memory",
    "count_macs",
    "count_parameters",
    "environment",
    "flop_counter_macs",
    "measure_latency",
    "measure_memory",
]
