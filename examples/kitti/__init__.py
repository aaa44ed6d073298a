"""The paper's depth network on KITTI: data, training, evaluation, prediction, comparison (`python -m` this
package).
"""
