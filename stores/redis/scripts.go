package redis

import (
	"crypto/sha1"
	_ "embed"
	"errors"
	"fmt"

	"github.com/redis/rueidis"
)

// script is one of the scripts that the server executes.
type script struct{ sum, source string }

func newScript(source string) script {
	return script{fmt.Sprintf("%x", sha1.Sum([]byte(source))), source}
}

var (
	//go:embed scripts/write.lua
	writeSource string
	//go:embed scripts/read.lua
	readSource string
	//go:embed scripts/find.lua
	findSource string

	writeScript = newScript(writeSource)
	readScript  = newScript(readSource)
	findScript  = newScript(findSource)
)

func (s script) call(b rueidis.Builder, keys []string, args []string) rueidis.Completed {
	return b.Evalsha().Sha1(s.sum).Numkeys(int64(len(keys))).Key(keys...).Arg(args...).Build()
}

// isUnloaded reports whether the server does not have a script: it has been
// restarted, or is another one.
func isUnloaded(err error) bool {
	var answer *rueidis.RedisError
	return errors.As(err, &answer) && answer.IsNoScript()
}
