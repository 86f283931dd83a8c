-- Reads events of a run.
-- KEYS: the run, its events. ARGV: after which event, about how many bytes.
-- Returns the number of the newest event, the end, and then the id and the data of each event that is read; nil for a run
-- that the store does not have.
local run = redis.call('HMGET', KEYS[1], 'last', 'end')
if not run[1] then
	return false
end
local answer, newest = {run[1], run[2]}, run[1] .. '-0'
local from, most = ARGV[1] .. '-0', tonumber(ARGV[2])
local size, events, count = 0, 0, 1
while true do
	local piece = redis.call('XRANGE', KEYS[2], '(' .. from, '+', 'COUNT', count)
	for _, event in ipairs(piece) do
		local data = event[2][2]
		from = event[1]
		answer[#answer + 1] = from
		answer[#answer + 1] = data
		size, events = size + #data, events + 1
		if size >= most then
			return answer
		end
	end
	if #piece < count or from == newest then
		return answer
	end
	-- As many more as there is room for, if they are like those before, and never more than so many at a time.
	count = math.max(1, math.min(64, math.floor((most - size) * events / size)))
end
