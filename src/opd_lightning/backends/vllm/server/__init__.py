"""Models behind vLLM servers, over HTTP: the only room that speaks it. Imports vLLM for `NCCLTransfer` alone.

`VLLMServerTeacher` (scores), `VLLMServerEngine` (rollouts; `FileTransfer` and `NCCLTransfer` bring the weights there),
`Connection` (where the servers are). `RubricJudge` asks any server with OpenAI's chat interface for text only.
"""

from opd_lightning.backends.vllm.server.client import Connection, ServerUnreachable
from opd_lightning.backends.vllm.server.engine import VLLMServerEngine
from opd_lightning.backends.vllm.server.rubric_judge import RubricJudge
from opd_lightning.backends.vllm.server.teacher import VLLMServerTeacher
from opd_lightning.backends.vllm.server.transfer import FileTransfer, NCCLTransfer

__all__ = [
    "Connection",
    "FileTransfer",
    "NCCLTransfer",
    "RubricJudge",
    "ServerUnreachable",
    "VLLMServerEngine",
    "VLLMServerTeacher",
]
