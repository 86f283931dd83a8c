-- Applies a write to a run.
-- KEYS: the run, its events.
-- ARGV: how long it stays (ms), its channel, the oldest event that must be kept, whether there is a begin, the begin,
-- whether there is an end, the end, and then the number and the data of each event. Or `drop` and the channel.
-- Returns 0 where the store does not have the run, else 1.
local ttl, channel = ARGV[1], ARGV[2]
if ttl == 'drop' then
	redis.call('DEL', KEYS[1], KEYS[2])
	redis.call('PUBLISH', channel, 'gone')
	return 1
end
local last = tonumber(redis.call('HGET', KEYS[1], 'last'))
if not last then
	if ARGV[4] == '0' then
		return 0
	end
	redis.call('DEL', KEYS[2])
	redis.call('HSET', KEYS[1], 'begin', ARGV[5], 'last', 0)
	last = 0
end
local before = last
for i = 8, #ARGV, 2 do
	local number = tonumber(ARGV[i])
	if number > last then
		if number ~= last + 1 then
			return redis.error_reply('GAP event ' .. ARGV[i] .. ' would follow event ' .. last)
		end
		local added
		if last == 0 then
			added = redis.call('XADD', KEYS[2], ARGV[i] .. '-0', 'd', ARGV[i + 1])
		else
			added = redis.call('XADD', KEYS[2], 'NOMKSTREAM', ARGV[i] .. '-0', 'd', ARGV[i + 1])
		end
		if not added then -- the server has evicted the events
			redis.call('DEL', KEYS[1])
			redis.call('PUBLISH', channel, 'gone')
			return 0
		end
		last = number
		redis.call('HSET', KEYS[1], 'last', ARGV[i])
	end
end
if tonumber(ARGV[3]) > 1 then
	redis.call('XTRIM', KEYS[2], 'MINID', '~', ARGV[3])
end
if ARGV[6] == '1' then
	redis.call('HSET', KEYS[1], 'end', ARGV[7])
end
redis.call('PEXPIRE', KEYS[1], ttl)
redis.call('PEXPIRE', KEYS[2], ttl)
if ARGV[6] == '1' then
	redis.call('PUBLISH', channel, 'end')
elseif last > before then
	redis.call('PUBLISH', channel, string.format('%.0f', last))
end
return 1
