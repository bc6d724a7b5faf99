"""Teachers: a server, a model in this process, or an engine on many GPUs or machines."""

from lit_distill.teachers.base import BatchTeacher, Teacher
from lit_distill.teachers.engines import RayTeacher, VLLMTeacher
from lit_distill.teachers.local import TransformersTeacher
from lit_distill.teachers.server import OpenAITeacher

__all__ = ["BatchTeacher", "OpenAITeacher", "RayTeacher", "Teacher", "TransformersTeacher", "VLLMTeacher"]
