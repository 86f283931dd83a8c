// Every client program prints what it sees as JSON lines, which report in
// ../clients_test.go reads.
export const report = (stream, kind, fields = {}) =>
	process.stdout.write(JSON.stringify({ stream, kind, ...fields }) + '\n');

// streams are the name=url arguments from the given one on.
export const streams = (from) =>
	process.argv.slice(from).map((arg) => {
		const at = arg.indexOf('=');
		return [arg.slice(0, at), arg.slice(at + 1)];
	});
