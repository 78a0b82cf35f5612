from recorded_runs import copied as copied  # fixtures
from recorded_runs import recorded as recorded
