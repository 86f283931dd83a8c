package harness

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
)

// Program returns the path of a program. If it is not there, it is installed
// from these Debian packages. If that fails, it is Missing.
//
//	nginx := harness.Program(t, "nginx", "nginx-light")
func Program(t testing.TB, name string, packages ...string) string {
	t.Helper()
	path, err := findProgram(name)
	if err == nil {
		return path
	}
	if err := installPackages(t, packages...); err != nil {
		Missing(t, name, err)
	}
	if path, err = findProgram(name); err != nil {
		Missing(t, name, err)
	}
	return path
}

// findProgram searches the sbin folders too, which are not on every user's
// PATH.
func findProgram(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", err
}

func installPackages(t testing.TB, packages ...string) error {
	t.Helper()
	if len(packages) == 0 {
		return errors.New("not on PATH")
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("not on PATH, and no apt-get to install %s", strings.Join(packages, ", "))
	}
	apt := Command("apt-get", "-o", "DPkg::Lock::Timeout=300")
	if !isRoot() {
		if _, err := exec.LookPath("sudo"); err != nil {
			return fmt.Errorf("not on PATH, and neither root nor sudo to install %s", strings.Join(packages, ", "))
		}
		apt = append(Command("sudo", "--non-interactive", "--preserve-env=DEBIAN_FRONTEND,RUNLEVEL"), apt...)
	}
	defer lock(t, "apt")()
	// In run level 1, installing a server does not start it as a service.
	quiet := Env("DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1")
	install := append(slices.Clone(apt), "install", "-qy", "--no-install-recommends")
	install = append(install, packages...)
	if err := run(t, install, quiet); err == nil {
		return nil
	}
	// The package lists may be old or missing.
	if err := run(t, append(slices.Clone(apt), "update", "-q"), quiet); err != nil {
		return err
	}
	return run(t, install, quiet)
}

// Python returns a virtual environment with exactly the packages that a file
// pins. A dependency that no test uses may be missing. Its programs are at
// filepath.Join(venv, "bin", "gunicorn") and so on.
func Python(t testing.TB, requirements string) (venv string) {
	t.Helper()
	python := Program(t, "python3", "python3", "python3-venv")
	version, err := exec.Command(python, "-VV").Output()
	if err != nil {
		Missing(t, "Python", err)
	}
	content := ReadFile(t, requirements)
	venv, err = once(t, "python", digest(string(version), python, content), func(dir string) error {
		create := Command(python, "-m", "venv", dir)
		if err := run(t, create); err != nil {
			// On Debian, venv is in a separate package.
			if run(t, Command(python, "-c", "import ensurepip")) == nil {
				return err
			}
			if err := installPackages(t, "python3-venv"); err != nil {
				return err
			}
			if err := run(t, append(create, "--clear")); err != nil {
				return err
			}
		}
		return run(t, Command(filepath.Join(dir, "bin", "python"), "-m", "pip", "install",
			"--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "-r", requirements))
	})
	if err != nil {
		Missing(t, "the Python packages of "+filepath.Base(filepath.Dir(requirements)), err)
	}
	return venv
}

// Node returns the path of node, and a copy of a project's folder in which the
// packages of its package-lock.json are installed. The checkout itself gets no
// node_modules, because go and gofmt would find other projects' Go files in it.
//
//	node, dir := harness.Node(t, harness.Root(t, "examples", "express"))
//	harness.Start(t, harness.Command(node, "server.js"), harness.In(dir))
func Node(t testing.TB, project string) (node, dir string) {
	t.Helper()
	node = Program(t, "node", "nodejs")
	npm := Program(t, "npm", "npm")
	version, err := exec.Command(node, "--version").Output()
	if err != nil {
		Missing(t, "Node.js", err)
	}
	manifest := ReadFile(t, filepath.Join(project, "package.json"))
	locked := ReadFile(t, filepath.Join(project, "package-lock.json"))
	if strings.Contains(locked, `"resolved": "http`) {
		t.Fatalf("%s: package-lock.json records where packages came from; make it with npm install --omit-lockfile-registry-resolved", project)
	}
	installed, err := once(t, "node", digest(string(version), manifest, locked), func(dir string) error {
		WriteFile(t, dir, "package.json", manifest)
		WriteFile(t, dir, "package-lock.json", locked)
		return run(t, Command(npm, "ci", "--engine-strict", "--no-audit", "--no-fund", "--ignore-scripts"), In(dir))
	})
	if err != nil {
		Missing(t, "the npm packages of "+filepath.Base(project), err)
	}
	files, err := sources(project)
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	if err := writeSources(files, dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(installed, "node_modules"), filepath.Join(dir, "node_modules")); err != nil {
		t.Fatal(err)
	}
	return node, dir
}

// Maven returns the path of java, and the jar that `mvn package` builds from a
// project's folder. It is built again if a file there has changed.
func Maven(t testing.TB, project string) (java, jar string) {
	t.Helper()
	java = Program(t, "java", "openjdk-17-jdk-headless")
	// Maven needs the compiler, which may be missing even if java is there.
	Program(t, "javac", "openjdk-17-jdk-headless")
	mvn := Program(t, "mvn", "maven")
	files, err := sources(project)
	if err != nil {
		t.Fatal(err)
	}
	var names, parts []string
	for name := range files {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		parts = append(parts, name, string(files[name]))
	}
	built, err := once(t, "maven", digest(parts...), func(dir string) error {
		if err := writeSources(files, dir); err != nil {
			return err
		}
		return run(t, Command(mvn, "-q", "-B", "package"), In(dir))
	})
	if err != nil {
		Missing(t, "the Maven build of "+filepath.Base(project), err)
	}
	jars, _ := filepath.Glob(filepath.Join(built, "target", "*.jar"))
	if len(jars) != 1 {
		t.Fatalf("mvn package has made %d jars: %s", len(jars), jars)
	}
	return java, jars[0]
}
